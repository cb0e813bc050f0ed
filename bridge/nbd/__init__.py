"""NBD: a client that survives its server, and a small server.

From the wire upwards:

* `protocol`: the numbers and layouts of the NBD specification;
* `handshake` (options) and `transmission` (commands and replies), `chunks`: sans-I/O;
* `connection`: one socket with both, driven by trio while it connects and by the data path's
  `Loop` afterwards; `tls`: the same over TLS;
* `session`: what happens when the server goes away and comes back, sans-I/O; `held`: where new
  changes wait because the server may still do something old;
* `split`, `align`, `ranges`: how a request becomes commands that this server takes;
* `client`: all of it behind `submit(request)`;
* `server_core`, `server`: a small server for the demo and the tests, with fault injection;
* `uri`, `export`, `options`: what to connect to, what was found there, how to behave.
"""
