"""The commands of `nbd-bridge`: what an operator types and reads.

- `main`: finds the command; each has a module: `serve`, `info`, `cache_show`, `cache_drop`,
  `cache_flush`, `cache_warm`, `cache_list`, `cache_prune`, `demo`, `plugin_path`,
  `install_units`, `man_pages` (made by `man`), `completion`;
- those that ask running bridges over their control sockets: `bridges` (`list`), `status`, `flush`,
  `resize`, `set_settings` (`set`), `stop`, `upgrade`; `control`: what they share;
- those that look for longer: `exporter`; `top`, with `top_loop`, `rates` (from two
  looks to what happens per second) and `top_screen`;
- `config_check`, `config_show`: look at configuration files; `config`: what they share;
  `config_file`: reads one;
- those that play a guest of any device: `bench`, `check`;
- `wording`: the text of every error and remedy. Only this module has sentences that name a command
  or an option;
- `common`: makes a command, prints its result, turns its errors into one line each;
- `variables`: environment variables that are no option's;
- `options`: parses options. They are declared in `bridge.app.settings` (of `serve`) and
  `bridge.app.command_settings`.

A new option is declared there; a new command gets a module here, its settings in
`command_settings`, and a line in `main`.
"""
