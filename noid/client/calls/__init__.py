"""Every question the REST interface answers, as data: a function for each, which returns the `Call` to make.

A `Call` knows its path, its body and what the answer must be, and touches no socket. So clients that wait in different
ways share all of it: ``client.perform(vms.create("web", ...))``, or the same with ``await``. There is a module for each
subject; nothing is imported here, because a command imports only what it asks.
"""
