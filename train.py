"""The command line: `python train.py fit|validate|test|predict --config FILE`, also under `fabric run` and torchrun."""

from eacmoe_lightning.cli import main

if __name__ == "__main__":
    main()
