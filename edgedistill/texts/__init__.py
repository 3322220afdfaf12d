"""Three texts of different kinds that every artifact is verified on: prose, code, multilingual."""
