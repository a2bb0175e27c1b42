"""Variants that serve a study and are not the default, loaded by name (--model.core, --model.loop.exit)."""
