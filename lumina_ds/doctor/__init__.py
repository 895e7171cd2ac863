"""What `lumina doctor` looks at: libraries, devices, memory, disks, hosts. Nothing is changed on the machine."""
