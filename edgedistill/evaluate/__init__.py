"""Does the artifact still do its job?"""
