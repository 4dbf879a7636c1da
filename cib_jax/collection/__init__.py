"""An index of photos in LanceDB: what is kept of each, and the whole opened for searching."""
