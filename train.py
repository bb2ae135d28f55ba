"""The command line in a checkout: `python train.py fit --config FILE`, also under `fabric run` and torchrun."""

from eacmoe_lightning.cli import main

if __name__ == "__main__":
    main()
