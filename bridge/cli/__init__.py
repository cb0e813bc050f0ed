"""The commands of `nbd-bridge`: what an operator types and reads.

- `main`: the commands that work on exports and cache files; `parameters`: what options accept;
  `output`: what every command says, and how it ends.
- `bridges` (`list`), `status`, `flush`, `resize`, `settings` (`set`), `stop`: they ask running
  bridges over their control sockets; `control`: what these share; `api_options`: those of `serve`.
"""
