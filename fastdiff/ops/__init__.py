"""The ops: one file each, contract and reference together; `ALL` is the list that the backend matrix is made from."""
