"""The version of the library, which `qat_config.json` and `verification.json` record."""

VERSION = "0.2.0"
