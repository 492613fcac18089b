"""The commands: one module per noun, imported when it is used."""
