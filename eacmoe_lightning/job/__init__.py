"""The Lightning side: LightningModule, trained parameters, data module, callback hooks and checkpoint I/O."""
