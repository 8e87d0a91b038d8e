"""`python -m tunesmith_cli`, and the `tunesmith` program."""

from tunesmith_cli.app import app

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
