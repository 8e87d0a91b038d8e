"""`python -m tunesmith_trainer`: the first process of a trainer pod."""

from tunesmith_trainer.pod.supervisor import main

if __name__ == "__main__":
    raise SystemExit(main())
