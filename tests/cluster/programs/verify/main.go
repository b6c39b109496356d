// Verifies a chain as Go's TLS does: verify ROOTS CHAIN NAME, where NAME is the SPIFFE id that the leaf must have.
package main

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
)

func certificates(file string) (all []*x509.Certificate) {
	text, err := os.ReadFile(file)
	fail(err)
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			return all
		}
		certificate, err := x509.ParseCertificate(block.Bytes)
		fail(err)
		all = append(all, certificate)
	}
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func main() {
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, root := range certificates(os.Args[1]) {
		roots.AddCert(root)
	}
	chain := certificates(os.Args[2])
	leaf := chain[0]
	for _, intermediate := range chain[1:] {
		intermediates.AddCert(intermediate)
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		_, err := leaf.Verify(x509.VerifyOptions{
			Roots: roots, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{usage},
		})
		fail(err)
	}
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != os.Args[3] {
		fail(fmt.Errorf("the leaf is of %v", leaf.URIs))
	}
	fmt.Println("verified by Go")
}
