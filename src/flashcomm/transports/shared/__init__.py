"""Memory that all ranks of a host map: whole collectives as compiled loops."""
