"""How fast does the artifact run, and in how much memory?"""
