"""The command line: `python train.py fit|validate|test|predict --config configs/tiny.yaml` (also under fabric and torchrun)."""

from eacmoe_lightning.cli import main

if __name__ == "__main__":
    main()
