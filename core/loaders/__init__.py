"""Where a checkpoint goes next: what each loader takes, as data and rules read from its source, and the judgement."""
