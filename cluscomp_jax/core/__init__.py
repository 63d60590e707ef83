"""Functions of arrays: CodebookArray, parameter trees, the compressed matrix product, losses."""
