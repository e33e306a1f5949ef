"""What is typed at a guest's shell: one line that brings a reader, then a program that runs one command.

Nothing here waits or sends; `noid_exec_serial.line` does. All that is typed is printable ASCII in short lines, so no
terminal setting, line editor or history expansion can act on it. The first line is typed where everybody can read it
and holds no secret; everything after it is typed only once the guest has shown that it does not echo.

The guest answers in records, see `noid_exec_serial.records`. What is typed never looks like a record, so an echo cannot
be taken for an answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

#: The most that is under way to a guest that has not said it took it: a terminal holds 4095 bytes and drops the rest.
BATCH_BYTES = 2048
#: The most encoded bytes on a line of input.
STDIN_LINE_BYTES = 900
#: What is refused before anything is typed: it would take minutes.
REQUEST_BYTES_MAX = 1 << 20

STOP_OUTPUT = b"\x13"
GO_ON = b"\x11"
#: Empties a line somebody half typed. Twice, because bash's editor takes what follows `GO_ON` as it is.
CLEAR = b"\x15\x15"
#: Ends a reader that an earlier connection left, and what it runs. For an idle shell it is a comment.
ABORT = b"#.\n"

_PIECE_CHARS = 500

# t: the terminal's settings, to be put back. s: the program, with its length after the last dot, so that a byte too
# few or too many (somebody else typed) keeps it from being run. A line that begins with # is answered: the guest took
# everything before it. ixon lets the host stop output; without isig nobody's ^C can end this in the middle and leave
# an interactive shell to read what follows.
_READER = (
    'n=@NONCE@;LC_ALL=C;export LC_ALL;m(){ printf "@%s %s %s@\\n" $n "$1" $n>&3;};'
    "t=$(stty -g)&&stty -echo -isig -iexten icanon icrnl -inlcr -igncr ixon -ixany||{ m n;exit;};m r;"
    's=$(while IFS= read -r l;do case $l in .*|"#.")break;;"#"*)m "k ${l#?}";;*)printf "%s\\n" "$l";;esac;done;'
    'printf %s "$l");[ ${#s} = "${s##*.}" ]&&(eval "${s%.*}");stty "$t";stty echo isig iexten;m q'
)

# What is uploaded. m prints a record, see above; fd 3 is the terminal; "$@" is the environment's entries, then argv;
# U the user, D the directory, I whether there is input.
#
#   typed -> reader -> feeder -> the command -> one encoder for each of stdout and stderr -> terminal
#
# The encoder reads what is there, up to 6 KiB, and prints it as numbered pieces and a checksum. The reader never waits
# for anybody but the terminal: the feeder acknowledges each line of input once the command has taken it, and the host
# has few on the way. When the command has ended, an end mark goes down both of its pipes, behind all it wrote: children
# it leaves may keep them open for ever. $P is what to kill if the host is replaced by another one: the host says it.
_PROGRAM = r"""
no(){ m "f $1";exit;}
for l in dd env id;do command -v $l>/dev/null 2>&1||no "tool $l";done
if printf a|base64>/dev/null 2>&1;then C=base64;code(){ base64;}
elif printf a|od -An -v -tx1>/dev/null 2>&1&&printf a|tr -d ' '>/dev/null 2>&1;then
C=hex;code(){ od -An -v -tx1|tr -d ' ';}
elif printf a|hexdump -v -e '/1 "%02x"'>/dev/null 2>&1;then C=hex;code(){ hexdump -v -e '16/1 "%02x" "\n"';}
else no 'tool base64';fi
if printf a|cksum>/dev/null 2>&1;then sum(){ cksum;}
elif printf a|md5sum>/dev/null 2>&1;then sum(){ md5sum;}
else sum(){ dd of=/dev/null 2>/dev/null;echo -;};fi
if command -v setsid>/dev/null 2>&1;then S=setsid;G=group;else S=;G=process;fi
w=$(id -u)
[ "$U" ]||U=$w
u=
if [ -r /etc/passwd ];then
while IFS=: read -r a b c d e f g;do if [ "$a" = "$U" ]||[ "$c" = "$U" ];then u=$a;k=$c;h=$f;break;fi;done</etc/passwd
fi
if [ -z "$u" ];then case $U in root|0)u=root;k=0;h=/root;g=;;$w)u=$w;k=$w;h=/;g=;;*)no user;;esac;fi
[ -d "$h" ]||h=/
if [ "$k" != "$w" ];then
[ "$w" = 0 ]||no "root $w"
command -v su>/dev/null 2>&1||no 'tool su'
fi
CDPATH=
case $D in "")D=$h;;/*);;*)D=$h/$D;;esac
cd "$D" 2>/dev/null||no cwd
umask 022
set -- env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
"HOME=$h" "USER=$u" "LOGNAME=$u" "SHELL=${g:-/bin/sh}" LANG=C.UTF-8 "$@"
[ "$k" = "$w" ]||set -- su -s /bin/sh -c 'exec "$@"' -- "$u" sh "$@"
run(){ $S sh -c 'printf "@%s p %s %s@\n" "$0" $$ "$0" "$0" $$ "$0">&3;exec "$@" 2>&4 3>&- 4>&-' $n "$@"
r=$?;printf "\036%s\036" $n;printf "\036%s\036" $n>&4;m "x $r $r";m "x $r $r";m "x $r $r";}
feed(){ exec 4>&-;trap '' PIPE
while IFS= read -r l;do printf "$l" 2>/dev/null||break;m a;done
m c;}
if [ $I = 1 ];then go(){ feed|run "$@";};else go(){ run "$@"</dev/null;};fi
put(){ sh -c 'printf "@%s t %s %s@\n" "$0" $PPID "$0" "$0" $PPID "$0">&3' $n
B=0
while b=$(dd bs=6144 count=1 2>/dev/null|code)&&[ "$b" ];do
c=$(printf %s $b|sum);c=${c%% *};s=$1;j=0;z=0
set -- $b
while [ $# -gt 0 ];do
p=$1$2$3$4$5$6$7$8$9;m "d $s $B $j ${#p} $p";j=$((j+1));z=$((z+${#p}))
if [ $# -gt 9 ];then shift 9;else shift $#;fi
done
m "b $s $B $j $z $c";m "b $s $B $j $z $c";B=$((B+1));set -- $s
done
m "z $1 $B";m "z $1 $B";}
m "o $C $G"
{ trap '' PIPE;P=
while IFS= read -r l;do case $l in
q|"#.")break;;
"#"*)m "k ${l#?}";;
P*)P=${l#P};;
s*)kill -${l#s} 2>/dev/null;;
i*)printf '%s\n' "${l#i}" 2>/dev/null;;
z)exec >&-;;
esac;done
[ "$l" = q ]||kill -9 $P 2>/dev/null
}|{ { { go "$@";} 2>/dev/null|put 1 4>&-;} 4>&1|put 2;}
"""

_UNSAFE = re.compile(rb"[^ -~]|['\\%-]")  # a format that begins with - is an option
_LITERAL = re.compile(rb"[ -&(-~]*\Z")  # everything printable but the quote


def end_mark(nonce: str) -> bytes:
    """Return what comes at the end of each stream of the command."""
    return b"\x1e" + nonce.encode("ascii") + b"\x1e"


def first_line(nonce: str) -> bytes:
    """Return what is typed at a prompt to bring the reader. It contains nothing of any request."""
    return f" sh -c '{_READER.replace('@NONCE@', nonce)}' 3>&1\n".encode("ascii")


def question(nonce: str) -> bytes:
    """Return a line a waiting shell answers with the record ``k 0``, and which otherwise does nothing."""
    return f' printf "@%s k 0 %s@\\n" {nonce} {nonce}\n'.encode("ascii")


def program(argv: list[bytes], env: list[bytes], *, user: bytes, cwd: bytes, stdin: bool) -> list[bytes]:
    """Return the lines that run *argv* exactly as it is, once the reader has them all.

    None of *argv*, *env* (``KEY=VALUE``), *user* and *cwd* holds a NUL. An empty *cwd* is the user's home.
    """
    lines = [*_assigned("U", user), *_assigned("D", cwd), f"I={int(stdin)}".encode()]
    if b"=" in argv[0]:  # env would take it for an entry of the environment
        argv = [b"sh", b"-c", b'exec "$@"', b"sh", *argv]
    lines += parameters([*env, *argv])
    lines += _PROGRAM.strip().encode("ascii").split(b"\n")
    length = sum(len(line) + 1 for line in lines)
    total = length + 2
    while total != length + 1 + len(str(total)):
        total = length + 1 + len(str(total))
    return [*lines, b".%d" % total]


def parameters(words: list[bytes]) -> list[bytes]:
    """Return lines that make *words*, none of which holds a NUL, the shell's positional parameters, byte for byte."""
    lines = [b"set --"]
    for word in words:
        lines += _assigned("p", word)
        lines.append(b'set -- "$@" "$p"')
    return lines


def batches(lines: list[bytes]) -> Iterator[bytes]:
    """Yield *lines* in pieces of at most `BATCH_BYTES`, to be acknowledged one by one."""
    batch = b""
    for line in lines:
        if batch and len(batch) + len(line) + 1 > BATCH_BYTES:
            yield batch
            batch = b""
        batch += line + b"\n"
    yield batch


def stdin_lines(data: bytes) -> Iterator[bytes]:
    """Yield the lines that feed *data* to the command; each is acknowledged once taken."""
    piece = b""
    for byte in data:
        encoded = _octal(byte)
        if len(piece) + len(encoded) > STDIN_LINE_BYTES:
            yield b"i" + piece + b"\n"
            piece = b""
        piece += encoded
    if piece:
        yield b"i" + piece + b"\n"


def quoted(data: bytes) -> bytes:
    """Return *data* as the format string of a ``printf`` that prints it: printable ASCII without quotes."""
    return _UNSAFE.sub(lambda match: b"\\%03o" % match[0][0], data)


def _octal(byte: int) -> bytes:
    return quoted(bytes([byte]))


def _assigned(name: str, value: bytes) -> list[bytes]:
    """Return lines that give the variable *name* exactly *value*."""
    to = name.encode("ascii")
    literal = _LITERAL.match(value) is not None
    text = value if literal else quoted(value)
    lines = []
    for at in range(0, max(len(text), 1), _PIECE_CHARS):
        before = b"$" + to if at else b""
        lines.append(to + b"=" + before + b"'" + text[at : at + _PIECE_CHARS] + b"'")
    if not literal:  # what $() would strip at the end is kept by the x
        lines.append(b'%s=$(printf "x${%s}x");%s=${%s#x};%s=${%s%%x}' % ((to,) * 6))
    return lines
