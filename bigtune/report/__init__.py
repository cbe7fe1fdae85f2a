"""What goes into the model, made visible: gathered as values, shown in a terminal or on a page."""
