"""Hypercorn and Quart-Trio, made fit to stand in the open. The only package that knows their private seams.

`settings` has the limits, `connection` what is one TCP or unix connection, `http` a request and its body, `exchange`
what surrounds it, `dispatch` the application that finds its handler, `websocket` a WebSocket, `staying`
what ends all that is open for long; here is how they take the libraries' places.

Each item carries a letter, and so does its test in ``tests/server/test_hardening.py``. The pins in pyproject are exact
because of this file: after changing them, these tests decide.

====  ==============================================================  ================================================
      what the libraries do                                           what happens here
====  ==============================================================  ================================================
A     a response cancels its own connection's bookkeeping: keep-alive  `HttpStream` cancels a handler only before its
      never times out, ``Connection: close`` never closes             response is sent
B     a client that does not read blocks a write, and shutdown, for    each piece of a write has a deadline, and all of
      ever                                                             them together have one once the server stops
C     a client that leaves cancels its handler                         intended: handlers only wait, operations live in
                                                                       the agent
D     at shutdown WebSockets are dropped without a close frame         `hold_websocket` says 1012
E     a handler's exception closes with 1000, "normal"                 `hold_websocket` says 1011
F     an empty binary message arrives as None                          it arrives as ``b""``
G     a message over the limit leaves connection and handler running   the connection is closed after 1009
H     permessage-deflate cannot be switched off; 58 KB unpack to GB    never negotiated
I     pings are sent, pongs never checked                              off; TCP keepalive finds dead peers
J     queues of 10 + 10 messages per WebSocket; while they are full    none: messages wait in the socket; while they do,
      nothing notices that the client is gone                          `Transport.is_gone` asks the socket itself
K     responses are cut after 60 s without an error                    no such limit; B bounds slow readers
L     a unix socket is taken from whoever serves it; peers unknown     `noid.server.listening` binds; peers' uids are in
                                                                       the request's scope
M     listening sockets are inherited by every child                   never: `noid.server.listening`
N     HTTP/2 in plain text cannot be switched off                      ignored; other versions than HTTP/1 get 505
R     closing with unread input resets the connection, and the answer  the connection lingers: EOF first, then input is
      (a 413, an exit code) may be lost                                discarded for a moment
S     sending on a closed connection never yields: a handler that     a send that wrote nothing yields, and every send
      only sends starves the whole server                             can be cancelled
U     a request's body is kept until somebody reads it, however    a PUT's body is a stream: `upload` reads it, and what
      large                                                           nobody reads is not taken from the socket
V     a response that fails in its middle is logged as a bug          `BrokenOff` ends the connection, with no end mark
T     a target without a path, `GET ?x`, is an IndexError in the log  400
W     a queue, a nursery, five tasks and three writes for every       one task and one write: `HttpStream`,
      request; a connection that was closed is kept until its idle    `IdleWatch`, and `noid.server.hardening.dispatch`
      timer runs out                                                  for Quart's part
X     connections are accepted without end                            so many in all, and from one address; one more
                                                                      hears 503 before anything is done for it
Y     certificates are read once; a TLS handshake may take a minute,  a new connection takes `Settings.tls` as it is
      and the end of one waits for its client; there is no R          then; all is bounded, and R holds
Z     a WebSocket whose client reads too slowly just ends             with 1008, if the client takes what was begun
====  ==============================================================  ================================================
"""

from __future__ import annotations

import hypercorn.protocol
import hypercorn.protocol.h11
import hypercorn.trio.run

from noid.server.hardening.admission import Connections
from noid.server.hardening.connection import TcpServer, Transport
from noid.server.hardening.dispatch import App
from noid.server.hardening.exchange import Exchange
from noid.server.hardening.http import BrokenOff, Http1Protocol, HttpStream, Upload, upload
from noid.server.hardening.settings import Settings
from noid.server.hardening.staying import End, Stay
from noid.server.hardening.websocket import RESTARTING, WebsocketStream, hold_websocket

__all__ = [
    "RESTARTING",
    "App",
    "BrokenOff",
    "Connections",
    "End",
    "Exchange",
    "Settings",
    "Stay",
    "TcpServer",
    "Transport",
    "Upload",
    "hold_websocket",
    "upload",
]


# worker_serve, ProtocolWrapper and H11Protocol look these names up in their modules when a connection arrives.
for _module, _name, _ours in (
    (hypercorn.trio.run, "TCPServer", TcpServer),
    (hypercorn.protocol, "H11Protocol", Http1Protocol),
    (hypercorn.protocol.h11, "HTTPStream", HttpStream),
    (hypercorn.protocol.h11, "WSStream", WebsocketStream),
):
    assert issubclass(_ours, getattr(_module, _name))  # noqa: S101  # the seam is where it was in the pinned release
    setattr(_module, _name, _ours)
