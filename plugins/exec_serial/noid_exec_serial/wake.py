"""What a shell can do to make a clone its own, and the receipt of it: no agent, so no system call of our choosing."""

from __future__ import annotations

import uuid

from noid.core.model.vms import Identity, Receipt, ReceiptItem

OUTPUT_BYTES_MAX = 65536
_ITEMS = ("clock", "randomness", "hostname", "machine-id", "boot-id", "generation", "hooks", "network")
_OPTIONAL = ("hooks", "network")
_STATUSES = ("done", "failed", "not_possible")
_TEXT_MAX = 256

# Crediting randomness needs an ioctl. perl is in every Debian, python3 in many roots; without either, what is written
# to /dev/urandom is stirred in, and the generator takes it up when the kernel next reseeds it: minutes later.
_SCRIPT = r"""
say(){ printf '%s|%s|%s|%s|%s\n' "$1" "$2" "$3" "$4" "$5";}
root=0;[ "$(id -u)" = 0 ]&&root=1
need='only root can'
b=$(date -u +%s 2>/dev/null)
if date -u -s "@$WAKE_SECS">/dev/null 2>&1;then say clock done "$b" "$(date -u +%s)" 'to the second'
else say clock failed "$b" '' 'date could not set it';fi
credit=
if [ $root = 1 ]&&command -v perl>/dev/null 2>&1;then
perl -e 'my @h=split / /,$ENV{WAKE_ENTROPY};my $d=pack("C*",map{hex}@h);open(my $f,">","/dev/urandom")or exit 1;
my $p=pack("ii",8*@h,scalar @h).$d;ioctl($f,0x40085203,$p)or exit 1;ioctl($f,0x5207,0)or exit 1;'>/dev/null 2>&1&&
credit=perl
fi
if [ $root = 1 ]&&[ -z "$credit" ]&&command -v python3>/dev/null 2>&1;then
python3 -c 'import fcntl,os,struct
d=bytes.fromhex(os.environ["WAKE_ENTROPY"])
f=os.open("/dev/urandom",os.O_WRONLY)
fcntl.ioctl(f,0x40085203,struct.pack("ii",8*len(d),len(d))+d)
fcntl.ioctl(f,0x5207)'>/dev/null 2>&1&&credit=python3
fi
if [ "$credit" ];then say randomness done '' '' "credited and reseeded by $credit"
elif printf "$WAKE_OCTAL">/dev/urandom 2>/dev/null;then
say randomness not_possible '' '' 'stirred in but not credited: the root has neither perl nor python3 to ask the kernel'
else say randomness failed '' '' 'cannot write to /dev/urandom';fi
b=$(cat /proc/sys/kernel/hostname 2>/dev/null)
if echo "$WAKE_HOSTNAME">/proc/sys/kernel/hostname||hostname "$WAKE_HOSTNAME";then
echo "$WAKE_HOSTNAME">/etc/hostname
if [ -f /etc/hosts ]&&grep -q "^127\.0\.1\.1" /etc/hosts;then
x=$(sed "s/^127\.0\.1\.1.*/127.0.1.1 $WAKE_HOSTNAME/" /etc/hosts)&&printf '%s\n' "$x">/etc/hosts;fi
say hostname done "$b" "$(cat /proc/sys/kernel/hostname)"
else say hostname failed "$b" '' "$need";fi 2>/dev/null
b=$(cat /etc/machine-id 2>/dev/null)
if rm -f /etc/machine-id&&echo "$WAKE_MACHINE_ID">/etc/machine-id&&chmod 444 /etc/machine-id
then say machine-id done "$b" "$WAKE_MACHINE_ID"
else say machine-id failed "$b" '' 'cannot write /etc/machine-id';fi 2>/dev/null
if mkdir -p /run/noid&&echo "$WAKE_GENERATION">/run/noid/generation
then say generation done '' "$WAKE_GENERATION"
else say generation failed '' '' 'cannot write /run/noid/generation';fi 2>/dev/null
f=/proc/sys/kernel/random/boot_id;b=$(cat $f 2>/dev/null)
if echo "$WAKE_BOOT_ID">/run/noid/boot_id&&chmod 444 /run/noid/boot_id&&umount $f;mount --bind /run/noid/boot_id $f
then say boot-id done "$b" "$(cat $f)";else say boot-id failed "$b" '' 'cannot mount over it';fi 2>/dev/null
if [ "$WAKE_HOOKS" ]&&[ -d /etc/noid/restore.d ];then say hooks not_possible '' '' 'not run without the agent';fi
if [ "$WAKE_NETWORK" ];then say network not_possible '' '' 'left as the guest set it up';fi
"""
ARGV = ("sh", "-c", _SCRIPT)


def environment(identity: Identity) -> dict[str, str]:
    """Return what the script is told: in its environment, which no console shows."""
    return {
        "WAKE_SECS": str((identity.unix_ns + 500_000_000) // 1_000_000_000),
        "WAKE_ENTROPY": identity.entropy.hex(" "),
        "WAKE_OCTAL": "".join(f"\\{byte:03o}" for byte in identity.entropy),
        "WAKE_HOSTNAME": identity.hostname,
        "WAKE_MACHINE_ID": identity.machine_id,
        "WAKE_GENERATION": str(identity.generation),
        "WAKE_BOOT_ID": str(uuid.uuid4()),
        "WAKE_HOOKS": "1" if identity.hook_timeout_secs > 0 else "",
        "WAKE_NETWORK": "1" if _has_network(identity) else "",
    }


def receipt(output: bytes) -> Receipt:
    """Return what the script reported. An item it should have reported and did not has failed."""
    items: dict[str, ReceiptItem] = {}
    for line in output.decode("utf-8", "replace").split("\n"):
        name, *fields = line.split("|")
        if name in _ITEMS and name not in items and len(fields) == 4 and fields[0] in _STATUSES:
            status, before, after, detail = (text[:_TEXT_MAX] for text in fields)
            # Without the agent an address is never changed, and a guest that had it keeps it.
            required = name != "network"
            items[name] = ReceiptItem(
                name=name, status=status, before=before, after=after, detail=detail, required=required
            )
    for name in _ITEMS:
        if name not in _OPTIONAL:
            items.setdefault(name, ReceiptItem(name=name, status="failed", detail="the guest did not report it"))
    return Receipt(items=tuple(items[name] for name in _ITEMS if name in items))


def _has_network(identity: Identity) -> bool:
    return identity.lease is not None and identity.lease.kind != "none"
