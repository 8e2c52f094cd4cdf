"""What travels between clients and server in fewer bytes: the codecs, the feedback of their errors, a reference."""
