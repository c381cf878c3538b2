"""One step of attention over a compressed key/value cache, read without ever writing it out decoded."""

from hashml_kernels.cache_decode.api import cache_decode as cache_decode
from hashml_kernels.cache_decode.formats import Coupled as Coupled
from hashml_kernels.cache_decode.formats import CoupledFormat as CoupledFormat
from hashml_kernels.cache_decode.formats import Dense as Dense
from hashml_kernels.cache_decode.formats import DenseFormat as DenseFormat
from hashml_kernels.cache_decode.formats import IntegerFormat as IntegerFormat
from hashml_kernels.cache_decode.formats import KiviFormat as KiviFormat
from hashml_kernels.cache_decode.formats import Quantised as Quantised
