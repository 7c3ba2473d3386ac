"""The machinery: text, tokens, batches, checkpoints, devices. Imports nothing from the rooms above it."""
