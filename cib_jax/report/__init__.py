"""Tables, figures and pages of runs, from numbers alone: no file is read, no network imported."""
