// Command hyper is every program of a local Kubernetes cluster in one binary: it links the control plane, the node
// agents, kubectl, helm and a small DNS server, and becomes the one that argv[0] names. One binary means one build, one
// link and one file to cache; tests/devcluster/binaries.py builds it and makes a symbolic link per program.
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"

	"github.com/spf13/cobra"
	"k8s.io/component-base/cli"
	kubectl "k8s.io/kubectl/pkg/cmd"
	kubectlutil "k8s.io/kubectl/pkg/cmd/util"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	kcm "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	proxy "k8s.io/kubernetes/cmd/kube-proxy/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

// component runs one of Kubernetes' own commands the way its upstream main does.
func component(command *cobra.Command) { os.Exit(cli.Run(command)) }

var programs = map[string]func(){
	"etcd":                    runEtcd,
	"cluster-dns":             runClusterDNS,
	"fake-gpu-plugin":         runGPUPlugin,
	"helm":                    runHelm,
	"kube-apiserver":          func() { component(apiserver.NewAPIServerCommand()) },
	"kube-controller-manager": func() { component(kcm.NewControllerManagerCommand()) },
	"kube-scheduler":          func() { component(scheduler.NewSchedulerCommand()) },
	"kube-proxy":              func() { component(proxy.NewProxyCommand()) },
	// The kubelet installs its own signal handler, and a second one in the process panics: hence the plain context.
	"kubelet": func() { component(kubelet.NewKubeletCommand(context.Background())) },
	"kubectl": func() {
		if err := cli.RunNoErrOutput(kubectl.NewDefaultKubectlCommand()); err != nil {
			kubectlutil.CheckErr(err)
		}
	},
}

func main() {
	name := filepath.Base(os.Args[0])
	if run, ok := programs[name]; ok {
		run()
		return
	}
	names := make([]string, 0, len(programs))
	for known := range programs {
		names = append(names, known)
	}
	sort.Strings(names)
	fmt.Fprintf(os.Stderr, "%s: no such program; call this binary through a link named %s\n", name, strings.Join(names, ", "))
	os.Exit(2)
}
