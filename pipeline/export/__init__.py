"""Export: a masks dataset in the forms that other tools read."""
