"""noid as a service: HTTP, WebSocket and the `noid-server` commands."""
