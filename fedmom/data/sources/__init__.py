"""Where examples come from: files that hold arrays, folders of images."""
