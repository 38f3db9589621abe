"""Routes of the library: artifacts, presets, extraction and calibration."""
