"""What every training shares: devices, ranks, optimizers, schedules, metrics."""
