"""`python -m tunesmith_trainer`: the first process of a trainer pod."""

from tunesmith_trainer.supervisor import main

if __name__ == "__main__":
    raise SystemExit(main())
