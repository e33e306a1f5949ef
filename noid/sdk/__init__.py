"""The Python SDK: `noid.Client` and what it gives, for trio. `noid.sync` has the same for programs without it.

Nothing here imports trio before somebody waits with it, because the synchronous face is made of this.
"""
