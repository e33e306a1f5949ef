"""The core: plugins, operations, sagas, lifecycle, store. Imports no server, client, command line or plugin."""
