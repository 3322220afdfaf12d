"""Is the artifact the model that we think it is?"""
