"""What leaves a run: its encoder as a module, as files that other libraries load, and features of images."""
