"""The server's side: an NBD client that survives its server.

From the wire upwards (the protocol's numbers and layouts: `bridge.spec.nbd`):

* sans-I/O: `handshake` (options) with `handshake_options`, `infos` and `refusals`; `transmission`
  (commands and replies) with `chunks`; `untrusted`: what a server says, bounded;
* `connecting`: a socket with a handshake, driven by trio; `connection`: the same with commands, on
  the data path's `Loop`, with `output` (what the socket did not take) and `silence` (is the server
  dead, or slow?); `tls`, `tls_connection`: both over TLS;
* `link`: what happens when the server goes away and comes back, sans-I/O. Its parts: `channels`
  (where commands go), `flushes`, `trial` with `suspects` (on what does the server hang up?),
  `patience` (how long it is waited for), `changes` with `overlaps`, `listed` and `grace` (which
  changes may go now);
* `commands`, `split`, `align`: how a request becomes commands that this server takes;
* `client`: all of it behind `submit(request)`; `opening`: its connections, and the names that our
  nbdkit plugin understands; `inspection`: what a server offers, without using it;
* `outage`: times without a server, counted and logged;
* `uri`, `export`, `client_options`: what to connect to, what was found there, how to behave;
* `volume_words`: what our nbdkit plugin understands in a name, and says in a description.
"""
