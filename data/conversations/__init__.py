"""From a row to labelled tokens: schemas, chat templates, formatting."""
