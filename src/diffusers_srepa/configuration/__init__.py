"""Options of the commands: declared once as dataclass fields, read from YAML files and command lines."""
