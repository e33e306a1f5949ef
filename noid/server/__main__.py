"""``python -m noid.server``: how a client starts the local agent without relying on what is on PATH."""

from noid.server.command import main

if __name__ == "__main__":
    main()
