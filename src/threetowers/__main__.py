"""`python -m threetowers`: the form that `torchrun -m` and `deepspeed --module` launch."""

from threetowers.cli import main

if __name__ == "__main__":
    main()
