"""What people run: one document, a service, a look at what was read, the doctor, benchmarks."""
