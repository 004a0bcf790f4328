"""What several files of tests share: problems, cases of the kernels, and a way to call `lion`."""
