"""Work shared by the devices of a machine and by the processes of a run."""
