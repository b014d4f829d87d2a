"""Names of what is compared in every report."""

BACKBONE, OFF, ON = "backbone", "memory off", "memory on"
WITH_CACHE = " + cache"
