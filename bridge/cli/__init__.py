"""The commands of `nbd-bridge`: what an operator types and reads.

- `main`: finds the command; one module for each: `serve`, `info`, `cache_show`, `cache_drop`,
  `cache_flush`, `cache_warm`, `demo`;
- those that ask running bridges over their control sockets: `bridges` (`list`), `status`, `flush`,
  `resize`, `set_settings` (`set`), `stop`; `control`: what they share;
- `wording`: what an operator is told of an error, and what helps: sentences that name a command or
  an option stand there, and nowhere else;
- `common`: how each is made, prints and fails; `options`: what options accept, made from
  `bridge.app.settings`, where every option is declared.

A new option goes into `bridge.app.settings`; a new command gets a module here, its settings there,
and a line in `main`.
"""
