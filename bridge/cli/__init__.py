"""The commands of `nbd-bridge`: what an operator types and reads.

- `main`: every command; `parameters`: what their options accept.
"""
