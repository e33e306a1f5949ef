"""``python -m noid`` is the ``noid`` command."""

from noid.cli.start import main

if __name__ == "__main__":
    main()
