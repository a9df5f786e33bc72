"""What the subcommands of ``anomalib-aprilgan`` do; loaded when one is called."""
