"""An artifact of one checkpoint made to fit another, by what both hold inside while they read the same texts."""
